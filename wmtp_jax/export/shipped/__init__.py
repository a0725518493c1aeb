"""Files that exports carry for `trust_remote_code`: read by `transformers` from there, never imported here."""
