"""What a row becomes and what the loss is: one file an objective."""
