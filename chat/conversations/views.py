"""What can be done with a conversation's turns besides saying something: other branches, answers
side by side, ratings, search, links to read along. Every form works without a script.
"""

from datetime import timedelta

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.http import Http404, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils import timezone
from django.utils.http import content_disposition_header
from django.utils.text import slugify
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST

from chat.conversations import live
from chat.conversations.export import FORMATS, exported
from chat.conversations.page import thread
from chat.conversations.tree import Tree, show
from chat.conversations.turns import judge
from chat.forms import RenameForm
from chat.models import Comparison, Conversation, Message, ShareLink
from portal.access import get_visible
from portal.numbers import whole_number
from portal.page import reason
from portal.text import is_storable

MOST_FOUND = 50  # messages that a search shows
SHARE_DAYS = (1, 7, 30)  # how long a link may live


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
    show(conversation, turn.pk)
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


@require_POST
def rate(request, pk):
    """What the reader thinks of an answer, whose id is `up` or `down`; the same again takes it
    back.
    """
    conversation = get_visible(Conversation.objects, request.user, pk=pk)
    field = "up" if "up" in request.POST else "down"
    answer = turn_of(request, conversation, field)
    if answer.role != Message.Role.ASSISTANT or answer.is_in_flight:
        raise Http404
    thumb = 1 if field == "up" else -1
    answer.thumb = None if answer.thumb == thumb else thumb
    answer.save(update_fields=["thumb"])
    return redirect(place(conversation, answer))


@require_POST
def restore(request, pk):
    """Takes the deletion of a conversation back."""
    deleted = Conversation.objects.filter(owner=request.user, pk=pk).exclude(deleted_at=None)
    if not deleted.update(deleted_at=None):
        raise Http404
    messages.success(request, _("The conversation is back."))
    return redirect("conversation", pk=pk)


@require_GET
def search(request):
    """The user's messages that contain `q`, the newest first, and conversations called so."""
    wanted = request.GET.get("q", "").strip()[:200]
    titles, hits = [], []
    if wanted and is_storable(wanted):
        titles = Conversation.objects.visible_to(request.user).filter(title__icontains=wanted)
        found = Message.objects.visible_to(request.user).filter(content__icontains=wanted)
        hits = found.select_related("conversation").order_by("-id")[:MOST_FOUND]
    for hit in hits:
        hit.address = f"{place(hit.conversation)}?at={hit.pk}#turn-{hit.pk}"
        hit.before, hit.match, hit.after = _around(hit.content, wanted)
    context = {"q": wanted, "titles": titles[:10], "hits": hits, "most": MOST_FOUND}
    return render(request, "chat/search.html", context)


def _around(text: str, wanted: str) -> tuple[str, str, str]:
    """The first place of `wanted`, with what stands before and after it."""
    at = max(text.lower().find(wanted.lower()), 0)
    end = at + len(wanted)
    before, after = text[max(0, at - 40) : at], text[end : end + 120]
    return ("…" if at > 40 else "") + before, text[at:end], after + "…" * (len(text) > end + 120)


@require_POST
def share(request, pk):
    """Makes a link to the conversation as it is now (`days`), or takes one back (`revoke`)."""
    conversation = get_visible(Conversation.objects, request.user, pk=pk)
    if "revoke" in request.POST:
        link = get_visible(conversation.share_links, request.user, pk=request.POST["revoke"])
        link.revoked_at = timezone.now()
        link.save(update_fields=["revoked_at"])
        messages.success(request, _("The link leads nowhere any more."))
        return redirect("conversation", pk=pk)
    days, leaf = whole_number(request.POST.get("days")), Tree(conversation).leaf
    if days not in SHARE_DAYS or leaf is None:
        raise Http404
    expires = timezone.now() + timedelta(days=days)
    conversation.share_links.create(leaf_id=leaf, expires_at=expires)
    return redirect(f"{place(conversation)}?shared=1")


@require_GET
def shared(request, token):
    """A shared conversation, read-only, for every member who has the link."""
    link = get_object_or_404(
        ShareLink.open_ones().select_related("conversation__owner"), token=token
    )
    before = whole_number(request.GET.get("before"))
    shown = thread(link.conversation, before=before, leaf=link.leaf_id)
    for turn in shown.turns:  # the answer that was shown, not what stood beside it
        turn.compared = None
    context = {"link": link, "shared": link.conversation, "thread": shown}
    return render(request, "chat/shared.html", context)


@require_GET
def export(request, pk, form):
    """The whole conversation as a file, Markdown or JSON."""
    found = get_visible(Conversation.objects, request.user, pk=pk)
    if form not in FORMATS:
        raise Http404
    response = HttpResponse(exported(found, form), content_type=FORMATS[form])
    name = f"{slugify(found.title, allow_unicode=True) or found.pk}.{form}"
    response["Content-Disposition"] = content_disposition_header(True, name)
    return response


@require_POST
def rename(request, pk):
    found = get_visible(Conversation.objects, request.user, pk=pk)
    form = RenameForm(request.POST, instance=found)
    if form.is_valid():
        form.save()
    return redirect("conversation", pk=pk)


@require_POST
def delete(request, pk):
    found = get_visible(Conversation.objects, request.user, pk=pk)
    live.put_away(found)
    return redirect(f"{reverse('chat')}?deleted={found.pk}")
