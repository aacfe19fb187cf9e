-- One part of many rows, in the order asked for, in one round trip.
-- KEYS: the table's mark, then for each row the key of its page.
-- ARGV: the expected mark; bytes wanted of each row; their offsets in the pages, 4 bytes little-endian each.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local size, offsets, parts = tonumber(ARGV[2]), ARGV[3], {}
local never = string.rep('\0', size)
for i = 2, #KEYS do
  local offset = struct.unpack('<I4', offsets, i * 4 - 7)
  local part = redis.call('GETRANGE', KEYS[i], offset, offset + size - 1)
  parts[i - 1] = part == '' and never or part
end
return table.concat(parts)
