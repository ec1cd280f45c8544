"""conv-facenet: photos become aligned faces, aligned faces become a verified embedding model."""

__version__ = "0.1.0"
