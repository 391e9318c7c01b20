//! Faults on purpose, built with feature `sabotage` only: the power cuts of `make crash-matrix` must
//! find each sync that is left out.

/// Whether `MARCOT_SABOTAGE` leaves this sync out.
#[cfg(feature = "sabotage")]
pub(crate) fn leaves_out(sync: &str) -> bool {
    std::env::var("MARCOT_SABOTAGE").is_ok_and(|value| value == sync || value == "all-syncs")
}

/// None, in a program for use.
#[cfg(not(feature = "sabotage"))]
pub(crate) const fn leaves_out(_: &str) -> bool {
    false
}
