"""Finds what is wrong with the identities of faces, names unlabelled people, and proposes changes to review."""
