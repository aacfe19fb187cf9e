-- Writes whole pages where there is none; returns the positions, from 0, of those that exist already.
-- KEYS: the table's mark, then pages. ARGV: the expected mark, then the pages' bytes.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local present = {}
for i = 2, #KEYS do
  if not redis.call('SET', KEYS[i], ARGV[i], 'NX') then present[#present + 1] = i - 2 end
end
return present
