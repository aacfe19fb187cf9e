-- Number of shares of a bundle, 0 if the bundle is unknown.
-- KEYS: the bundle's shares; the table's mark at home, and the mark of a table that is being removed; the kinds of a
-- bundle of one share. ARGV: the number for a bundle that is unknown, or 0.
local known = redis.call('GET', KEYS[1])
if known then return tonumber(known) end
local mark = redis.call('GET', KEYS[2]) or redis.call('GET', KEYS[3])
if mark then return tonumber(string.match(mark, 'shares=(%d+)') or 1) end
if redis.call('EXISTS', KEYS[4]) > 0 then return 1 end
local shares = tonumber(ARGV[1])
if shares == 0 then return 0 end
redis.call('SET', KEYS[1], shares)
return shares
