"""The page of `serve`: questions from a browser, answered out of an index, for several people at once."""
