-- Writes each record whose sequence number is above the stored one, or equal where asked to, and lists the ids that are
-- new; returns how many.
-- KEYS: the records, their ids in order, the bundle's kinds. ARGV: the kind; 1 to write at equal numbers too; then for each record its id and its
-- value, which is six bytes of seq + 1, big-endian, and the payload.
redis.call('SADD', KEYS[3], ARGV[1])
local written = 0
for i = 3, #ARGV, 2 do
  local id, value = ARGV[i], ARGV[i + 1]
  local stored = redis.call('HGET', KEYS[1], id)
  if not stored then redis.call('RPUSH', KEYS[2], id) end
  if not stored or struct.unpack('>I6', value) + tonumber(ARGV[2]) > struct.unpack('>I6', stored) then
    redis.call('HSET', KEYS[1], id, value)
    written = written + 1
  end
end
return written
