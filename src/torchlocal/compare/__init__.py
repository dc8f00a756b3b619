"""Methods side by side: what is trained, their costs, the report."""
