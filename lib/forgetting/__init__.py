"""Takes people and photos out of everything that the jobs have made."""
