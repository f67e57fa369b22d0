"""What this PBX decides, as pure machines over control.sip."""
