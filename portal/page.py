"""What every page needs: the shell's context."""


def shell(request):
    """Context processor. `theme` is written into <html>, so that the first paint is right."""
    theme = request.COOKIES.get("theme")
    return {"theme": theme if theme in ("light", "dark") else None}
