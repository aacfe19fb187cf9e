-- What was written to a kind of records since a follower last asked: {lost, entry, mark, ids...}.
-- KEYS: the kind's changes, the table's mark, the list of the kind and the list of changed items of an older release.
-- ARGV: the entry that the follower read last, or ''; that entry's mark; a new mark; how many entries at most.
-- An entry is there with the mark that the follower knows, or the follower cannot tell what it has missed.
if redis.call('UNLINK', KEYS[3], KEYS[4]) > 0 then
  -- A writer of an older release says nothing of what it changes: all followers read everything.
  redis.call('XADD', KEYS[1], 'MAXLEN', '~', 4096, '*', 'mark', ARGV[3], 'all', '')
end
if redis.call('EXISTS', KEYS[1]) == 0 and redis.call('EXISTS', KEYS[2]) == 1 then
  redis.call('XADD', KEYS[1], '*', 'mark', ARGV[3])
  local left = redis.call('PTTL', KEYS[2])
  if left > 0 then redis.call('PEXPIRE', KEYS[1], left) end
end
local reply, known = {0, ARGV[1], ARGV[2]}, nil
if ARGV[1] ~= '' then known = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1] end
local lost = not known or known[2][2] ~= ARGV[2]
if not lost then
  for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[4])) do
    local fields = entry[2]
    reply[2], reply[3] = entry[1], fields[2]
    for i = 3, #fields, 2 do
      if fields[i] == 'all' then lost = true end
      reply[#reply + 1] = fields[i + 1]
    end
  end
end
if not lost then return reply end
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
return {1, last and last[1] or '', last and last[2][2] or ''}
