"""What optserve is measured against: small, fair programs, each doing the same job its own way."""
