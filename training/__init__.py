"""How does a long run survive? Options, ranks, sharding, saved state, order of data, memory."""
