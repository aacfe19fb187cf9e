-- Removes each record whose sequence number is below its removal's, and keeps the removal's number under a salted hash of
-- the id; returns how many records were removed.
-- KEYS: the records, the bundle's kinds, the table's mark, and the kind's removals.
-- ARGV: the kind; a salt, used if the removals have none; then for each record its id and six bytes of seq + 1,
-- big-endian.
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('HSETNX', KEYS[4], 'salt', ARGV[2])
local salt, removed = redis.call('HGET', KEYS[4], 'salt'), 0
for i = 3, #ARGV, 2 do
  local id, seq = ARGV[i], ARGV[i + 1]
  local field = redis.sha1hex(salt .. id)
  local known = redis.call('HGET', KEYS[4], field)
  if not known or struct.unpack('>I6', seq) > struct.unpack('>I6', known) then
    redis.call('HSET', KEYS[4], field, seq)
  end
  local stored = redis.call('HGET', KEYS[1], id)
  if stored and struct.unpack('>I6', stored) < struct.unpack('>I6', seq) then
    removed = removed + redis.call('HDEL', KEYS[1], id)
  end
end
local left = redis.call('PTTL', KEYS[3])
if left > 0 then
  for i = 1, #KEYS do
    if i ~= 3 then redis.call('PEXPIRE', KEYS[i], left) end
  end
end
return removed
