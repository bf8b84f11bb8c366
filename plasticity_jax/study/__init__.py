"""The whole experiment: graph, execution, status, report."""
