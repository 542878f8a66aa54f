"""Check that an implementation computes what `refengine.spec` defines: cases, laws, mistakes, traces."""
