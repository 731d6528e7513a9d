"""What clients reach: routes, the checks before them, pages, connections and the log."""
