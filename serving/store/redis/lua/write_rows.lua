-- Writes each row whose sequence number is above the stored one, or equal where asked to; returns how many.
-- KEYS: the table's mark, then each page once.
-- ARGV: the expected mark; bytes of a page; bytes of a row; for each row its place (index in KEYS and offset in the
-- page, 4 bytes little-endian each); the rows; 1 to write at equal numbers too.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local page_size, row_size, places, rows = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
local written, again = 0, tonumber(ARGV[6])
for i = 0, #places / 8 - 1 do
  local index, offset = struct.unpack('<I4I4', places, i * 8 + 1)
  local key, at, stored = KEYS[index], i * row_size + 1, 0
  local header = redis.call('GETRANGE', key, offset, offset + 5)
  if header == '' then
    -- At full size at once: a string that grows row by row keeps spare room that is never used.
    redis.call('SETRANGE', key, page_size - 1, '\0')
  else
    -- As numbers: Lua compares strings by the server's locale, which is not the order of their bytes.
    stored = struct.unpack('>I6', header)
  end
  if struct.unpack('>I6', rows, at) + again > stored then
    redis.call('SETRANGE', key, offset, string.sub(rows, at, at + row_size - 1))
    written = written + 1
  end
end
return written
