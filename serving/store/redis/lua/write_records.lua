-- Writes each record whose sequence number is above the stored one, or equal where asked to, and notes its id among the
-- kind's changes where there are followers; returns how many.
-- KEYS: the records, the bundle's kinds, the table's mark, the kind's removals, and the kind's changes where it is
-- followed. A record that is older than its removal is not written.
-- ARGV: the kind; 1 to write at equal numbers too; a new mark; then for each record its id and its value, which is six
-- bytes of seq + 1, big-endian, and the payload.
redis.call('SADD', KEYS[2], ARGV[1])
local written, entry = 0, {'mark', ARGV[3]}
local salt = redis.call('HGET', KEYS[4], 'salt')
for i = 4, #ARGV, 2 do
  local id, value = ARGV[i], ARGV[i + 1]
  local stored = redis.call('HGET', KEYS[1], id)
  local removed = salt and redis.call('HGET', KEYS[4], redis.sha1hex(salt .. id))
  local refused = removed and struct.unpack('>I6', value) < struct.unpack('>I6', removed)
  local newer = not stored or struct.unpack('>I6', value) + tonumber(ARGV[2]) > struct.unpack('>I6', stored)
  if newer and not refused then
    redis.call('HSET', KEYS[1], id, value)
    written = written + 1
    entry[#entry + 1], entry[#entry + 2] = 'id', id
  end
end
if KEYS[5] and written > 0 then
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', 4096, '*', unpack(entry))
end
-- What is new in a bundle that is to go goes with it.
local left = redis.call('PTTL', KEYS[3])
if left > 0 then
  for i = 1, #KEYS do
    if i ~= 3 then redis.call('PEXPIRE', KEYS[i], left) end
  end
end
return written
