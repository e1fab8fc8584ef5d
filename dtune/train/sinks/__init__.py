"""Where numbers go: each sink takes every row of metrics on the first rank."""
