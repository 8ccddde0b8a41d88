"""Where a model runs: processes, meshes, sharding, recomputation, compilation. One entry: `parallelize`."""
