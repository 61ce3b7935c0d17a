"""Replies that run on another host with the same database: how they are followed and ended from here."""
