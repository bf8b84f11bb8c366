"""What a run is on disk: identity and hash, directory and locks, logs, provenance, storage."""
