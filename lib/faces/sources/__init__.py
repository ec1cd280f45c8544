"""Sources of photos: folders, tables, archives and records, with one interface (`source.py`)."""
