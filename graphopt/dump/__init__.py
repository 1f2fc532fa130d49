"""Views of a program (text, JSON, Python, DOT) and pictures of its memory."""
