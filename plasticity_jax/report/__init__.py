"""The page of a study: reading results, comparisons, verdicts, tables, figures."""
