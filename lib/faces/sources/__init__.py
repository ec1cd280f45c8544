"""Where photos come from: folders, tables, archives and records, behind one interface (`source.py`)."""
