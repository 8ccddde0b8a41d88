"""Products, casts and moves of data: the arithmetic that everything above is made of. Imports no other room."""
