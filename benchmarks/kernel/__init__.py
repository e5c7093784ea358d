"""What hidden attention costs on a machine, and the least that it could cost there."""
