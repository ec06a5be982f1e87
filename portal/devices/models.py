"""The devices of every machine, and who holds how much of them."""

from django.conf import settings
from django.db import models
from django.utils.translation import gettext_lazy as _


class Device(models.Model):
    """A device of one machine, as that machine last told. Kept when it vanishes: runs that wait
    for it say so.
    """

    host = models.CharField(_("machine"), max_length=200)
    name = models.CharField(_("device"), max_length=20)  # cpu, cpu:N, cuda:N
    bytes = models.PositiveBigIntegerField(_("memory"))
    declared = models.BooleanField(default=False)  # by PORTAL_DEVICES
    missing_since = models.DateTimeField(null=True, blank=True)
    # taken out of service by an admin
    out_since = models.DateTimeField(null=True, blank=True)
    out_reason = models.CharField(_("reason"), max_length=200, blank=True)
    out_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.SET_NULL, null=True, related_name="+"
    )

    class Meta:
        app_label = "portal"
        verbose_name = _("device")
        verbose_name_plural = _("devices")
        ordering = ["host", "id"]
        constraints = [models.UniqueConstraint(fields=["host", "name"], name="one_row_a_device")]

    def __str__(self):
        return f"{self.name}@{self.host}"

    @property
    def state(self) -> str:
        """ready | missing | out (of service)"""
        if self.missing_since is not None:
            return "missing"
        return "ready" if self.out_since is None else "out"

    @property
    def usable(self) -> bool:
        return self.state == "ready"


class DeviceClaim(models.Model):
    """`device` set: the holder has `bytes` of it. Not set: it waits, and `reason` says why. Written
    only in portal/devices/arbiter.py.

    A run's claim holds as long as the run's row is running with that token; a worker's until its
    lease is over.
    """

    host = models.CharField(max_length=200)
    device = models.ForeignKey(Device, models.CASCADE, null=True, related_name="claims")
    holder = models.CharField(max_length=300)
    use = models.CharField(max_length=20)  # chat, or the run's kind
    label = models.CharField(max_length=200, blank=True)  # the checkpoint's name
    run = models.ForeignKey("portal.Run", models.CASCADE, null=True, related_name="device_claims")
    token = models.CharField(max_length=32, blank=True)
    bytes = models.PositiveBigIntegerField()
    least = models.PositiveBigIntegerField(default=0)
    names = models.JSONField(default=list)
    reason = models.JSONField(null=True)
    since = models.DateTimeField(auto_now_add=True)
    lease_expires_at = models.DateTimeField(null=True)
    # a waiting run's holder, for which chat is to leave the device
    asked_by = models.CharField(max_length=300, blank=True)

    class Meta:
        app_label = "portal"
        verbose_name = _("device claim")
        verbose_name_plural = _("device claims")
        ordering = ["id"]
        constraints = [
            models.UniqueConstraint(fields=["holder", "device"], name="one_claim_a_device"),
            models.UniqueConstraint(
                fields=["holder"], condition=models.Q(device=None), name="one_wait_a_holder"
            ),
        ]

    def __str__(self):
        return f"{self.holder}: {self.bytes}"
