"""What can be done with a conversation's turns besides saying something: other branches, answers
side by side. Every form works without a script.
"""

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.http import Http404
from django.shortcuts import redirect
from django.views.decorators.http import require_POST

from chat.conversations.tree import show
from chat.conversations.turns import judge
from chat.models import Comparison, Conversation, Message
from portal.access import get_visible
from portal.page import reason


def place(conversation, message=None) -> str:
    """The address of a conversation, at one of its turns."""
    address = redirect("conversation", pk=conversation.pk).url
    return f"{address}#turn-{message.pk}" if message else address


def turn_of(request, conversation, field: str = "message") -> Message:
    """The turn of `conversation` that the form names; Http404."""
    return get_visible(conversation.messages, request.user, pk=request.POST.get(field))


@require_POST
def branch(request, pk):
    """Shows the branch through the turn `message`, and goes on with it from then on."""
    conversation = get_visible(Conversation.objects, request.user, pk=pk)
    turn = turn_of(request, conversation)
    show(conversation, turn)
    return redirect(place(conversation, turn))


@require_POST
def compared(request, pk):
    """The verdict on a comparison: `better` is an answer's id, or `verdict` is same or none."""
    found = get_visible(Comparison.objects.select_related("conversation"), request.user, pk=pk)
    chosen, verdict = None, request.POST.get("verdict", "")
    if "better" in request.POST:
        chosen, verdict = turn_of(request, found.conversation, "better"), "better"
        if chosen.comparison_id != found.pk:
            raise Http404
    try:
        judge(found, verdict, chosen)
    except ValidationError as error:
        messages.error(request, reason(error))
    return redirect("conversation", pk=found.conversation_id)
