"""Ground floor: status codes, cost counts, key derivation, errors, chunked maps."""
