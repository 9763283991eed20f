"""Windows and documents, the score and its audit."""
