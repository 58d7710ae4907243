"""Each folder answers one question; its README says which."""
