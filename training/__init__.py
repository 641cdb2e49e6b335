"""How does a long run survive? Options, ranks, sharding, saved state, data order, memory plan, optimiser."""
