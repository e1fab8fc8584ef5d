"""From a path to a model: structure, roles of its linears, weights, attention."""
