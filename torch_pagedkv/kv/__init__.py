"""The managed KV cache: block bookkeeping in plain Python (`blocks`) and the tensors it describes (`pool`)."""
