"""The one Decoder, its parts, and the families that describe models for it. Knows nothing of meshes or converters."""
