"""What a study cannot do, in one line for whoever started it."""


class StudyError(Exception):
    """Bad input or a bad file; its text is the one line that the command prints."""
