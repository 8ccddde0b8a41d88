"""What a model says: text generated from it, and whether training taught it what it should know."""
