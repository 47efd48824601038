"""One checkpoint format for everything: logical tensors, by parameter name and expert id.

It knows nothing of ranks, ZeRO stage, expert-parallel size or placement. A folder `step-00000100` holds safetensors
shards (`model-*.safetensors` with fp32 master weights, `optimizer-*.safetensors` with both Adam moments),
`config.yaml`, and `checkpoint.json`: the state of the run, every tensor's file, shape and checksum, and a checksum of
its own. The placement at the time of saving is a part of that state, which `placing` sets and reads.
"""
