//! Log-in of a connection, both sides: by password (OPAQUE), by a clone's key (Ed25519), or to an
//! account of the donor's database, which is given the password itself.
//!
//! The first two bind the TLS connection that they were made on, so a log-in cannot be relayed onto
//! another; the third gives the password to none but the donor that was verified.

pub mod client;
mod database;
mod guesses;
pub mod server;

pub use client::{log_in_with_key, log_in_with_password};
pub use database::{DatabaseAccounts, Trust};

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use opaque_ke::Identifiers;
use zeroize::Zeroizing;

use crate::failure::Failure;

/// Largest message of a log-in: names, keys and a password, of less than 2 KiB together.
pub const LOG_IN_MESSAGE_BYTES_MAX: usize = 16 << 10;

/// Largest answer in a log-in: a certificate chain is in it.
pub const LOG_IN_ANSWER_BYTES_MAX: usize = 64 << 10;

/// Capability of a donor that binds snapshots to their clones' keys, and takes log-ins by them without
/// accounts as well.
pub const BOUND_SNAPSHOTS: &str = "bound_snapshots";

/// First bytes of what is signed: nothing else is signed with a clone's key.
const KEY_DOMAIN: &[u8] = b"marcot key log-in v1";

/// Bytes of an Ed25519 key's seed (RFC 8032, 5.1.5).
pub const SEED_BYTES: usize = 32;

/// First bytes of OPAQUE's context.
const PASSWORD_DOMAIN: &[u8] = b"marcot log-in v1";

/// What a log-in by password is bound to besides the password.
fn password_context(channel_binding: Option<&[u8; 32]>) -> Vec<u8> {
    let binding = channel_binding.map_or(&[][..], |binding| &binding[..]);
    [PASSWORD_DOMAIN, &[0], binding].concat()
}

/// Registration names no one; the user is the credential identifier.
fn identifiers() -> Identifiers<'static> {
    Identifiers { client: None, server: None }
}

/// What a log-in by key signs.
fn key_message(snapshot: &str, nonce: &[u8; 32], channel_binding: Option<&[u8; 32]>) -> Vec<u8> {
    let binding = channel_binding.map_or(&[][..], |binding| &binding[..]);
    [KEY_DOMAIN, &[0], snapshot.as_bytes(), &[0], nonce, binding].concat()
}

/// A clone's own key: it opens a snapshot with the public half, and logs further connections in
/// with the other, which never leaves this host.
pub struct CloneKey {
    pair: Ed25519KeyPair,
    public: [u8; 32],
    seed: Zeroizing<[u8; SEED_BYTES]>,
}

impl std::fmt::Debug for CloneKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CloneKey")
    }
}

impl CloneKey {
    /// A fresh key.
    pub fn generate() -> Result<Self, Failure> {
        let mut seed = Zeroizing::new([0; SEED_BYTES]);
        aws_lc_rs::rand::fill(&mut seed[..])
            .map_err(|_| Failure::bug("the system gives no random bytes"))?;
        Self::from_seed(&seed)
    }

    /// The key that has this seed.
    pub fn from_seed(seed: &[u8; SEED_BYTES]) -> Result<Self, Failure> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed)
            .map_err(|_| Failure::bug("an Ed25519 key could not be made"))?;
        let public = pair.public_key().as_ref().try_into();
        let public = public.map_err(|_| Failure::bug("an Ed25519 key has another length"))?;
        Ok(Self { pair, public, seed: Zeroizing::new(*seed) })
    }

    /// All that is secret of it: to be kept where only this service reads, for a restart.
    #[must_use]
    pub fn seed(&self) -> &[u8; SEED_BYTES] {
        &self.seed
    }

    /// The public half.
    #[must_use]
    pub fn public_key(&self) -> &[u8; 32] {
        &self.public
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(message).as_ref().to_vec()
    }
}

fn signature_is_right(public_key: &[u8; 32], message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ED25519, public_key).verify(message, signature).is_ok()
}
