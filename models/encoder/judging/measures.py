"""Names and meanings of the measures of a space that the report shows and that `[run.gates]` may limit."""

MEASURES = {
    "recall_new": "co-liked items among the 50 nearest, for items without a like in training",
    "recall_later": "co-liked items among the 50 nearest, by likes after training",
    "search": "queries by a phrase whose item is among the first 10; the words of the titles are taken out",
    "passages": "reciprocal rank of the item of a passage beyond the first words of its text",
    "aspects": "of the 10 nearest items, those that share a value of a column, in the mean over the columns",
    "concepts": "pairs of a carried and a missing value that a linear probe of other items puts in the right order",
    "conditional": "of the 10 nearest items to an item and a value it lacks, those with that value and one of its own",
}
"""Meaning of each measure by name. Every measure is a mean over queries in [0, 1], and higher is better."""

LEAST_QUERIES = 20
"""Fewest queries from which a measure is told."""
