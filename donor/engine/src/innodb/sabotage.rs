//! Faults on purpose, built with feature `sabotage` only: what proves a clone right must find each.

/// The fault that `MARCOT_SABOTAGE` names is this one.
#[cfg(feature = "sabotage")]
pub(super) fn is(name: &str) -> bool {
    std::env::var("MARCOT_SABOTAGE").is_ok_and(|value| value == name)
}

/// None, in a program for use.
#[cfg(not(feature = "sabotage"))]
pub(super) const fn is(_: &str) -> bool {
    false
}
