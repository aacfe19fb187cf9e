-- Number of shares of a bundle, 0 if the bundle is unknown; and 1 if this call has set the number.
-- KEYS: the bundle's shares; then, of a bundle of one share, the table's mark, the mark of a table that is being
-- removed, and the kinds. ARGV: the number for a bundle that is unknown, or 0.
local known = redis.call('GET', KEYS[1])
if known then return {tonumber(known), 0} end
if redis.call('EXISTS', KEYS[2], KEYS[3], KEYS[4]) > 0 then return {1, 0} end
local shares = tonumber(ARGV[1])
if shares == 0 then return {0, 0} end
redis.call('SET', KEYS[1], shares)
return {shares, 1}
