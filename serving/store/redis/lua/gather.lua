-- One part of many rows, in the order asked for, in one round trip.
-- KEYS: the table's mark, then each page once.
-- ARGV: the expected mark; bytes wanted of each row; for each row its place (index in KEYS and offset in the page, 4 bytes
-- little-endian each).
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local size, places, parts = tonumber(ARGV[2]), ARGV[3], {}
local never = string.rep('\0', size)
for i = 0, #places / 8 - 1 do
  local index, offset = struct.unpack('<I4I4', places, i * 8 + 1)
  local part = redis.call('GETRANGE', KEYS[index], offset, offset + size - 1)
  parts[i + 1] = part == '' and never or part
end
return table.concat(parts)
