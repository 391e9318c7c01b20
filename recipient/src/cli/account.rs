//! `marcot account`: the accounts file of a donor or recipient.

use marcot_common::{accounts::Accounts, failure::Failure};

use super::{arguments::AccountCommand, output::Output, secret};

pub(super) fn run(command: &AccountCommand, output: Output) -> Result<(), Failure> {
    let changed = match command {
        AccountCommand::Add { name, accounts, privilege } => {
            let mut file = Accounts::open_or_create(accounts).map_err(wrong)?;
            let password = secret::read_new(&format!("Password of '{name}': "))?;
            file.add(name, &password, privilege).map_err(wrong)?;
            file
        }
        AccountCommand::Remove { name, accounts } => {
            let mut file = Accounts::open(accounts).map_err(wrong)?;
            file.remove(name).map_err(wrong)?;
            file
        }
        AccountCommand::List { accounts } => {
            output.accounts(&Accounts::open(accounts).map_err(wrong)?.list());
            return Ok(());
        }
    };
    changed.save().map_err(wrong)
}

#[expect(clippy::needless_pass_by_value, reason = "fits map_err")]
fn wrong(error: marcot_common::accounts::AccountsError) -> Failure {
    Failure::precondition("ACCOUNTS_FILE", error.to_string())
}
