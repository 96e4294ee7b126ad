"""Store, stream, views, packing, ledger, and the preparation of raw logs."""
