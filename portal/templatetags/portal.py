"""Template tags of the portal's own look."""

from django import template
from django.utils.html import format_html

register = template.Library()


@register.simple_tag
def icon(name, extra=""):
    """An icon of the sprite (templates/portal/_icons.svg); decorative, so hidden from screen readers."""
    return format_html(
        '<svg class="i{}" aria-hidden="true"><use href="#i-{}"/></svg>', f" {extra}" if extra else "", name
    )
