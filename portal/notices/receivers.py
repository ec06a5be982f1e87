"""What other parts say happened, told to whom it concerns."""

from django.dispatch import receiver
from django.urls import reverse

from portal.budget.signals import nearly_spent
from portal.notices.notify import notify


@receiver(nearly_spent)
def warn(sender, account, percent, **more):
    """Whose balance it is: a member, or all of a team."""
    users = [account.user] if account.user is not None else []
    if account.team is not None:
        users = list(account.team.members.all())
    for user in users:
        notify(user, "nearly_spent", str(percent), reverse("account"))
